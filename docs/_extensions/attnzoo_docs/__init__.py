"""What the pages are built with: formulas, pages made from the packages, and the check of what was built."""
