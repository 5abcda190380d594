"""The command that converts: in memory, or from folder to folder layer by layer."""
