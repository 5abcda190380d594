"""What people read: warnings, tables, names that were meant, and files of results."""
