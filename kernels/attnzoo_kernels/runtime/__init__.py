"""What is known of the process: its memory, its processor, and whether a program is being traced."""
