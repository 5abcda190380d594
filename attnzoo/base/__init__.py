"""What every layer shares: its steps, the records between them, its configuration, and rotary positions."""
