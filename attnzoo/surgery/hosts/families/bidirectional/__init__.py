"""Families whose blocks read what comes behind a token too: encoders of texts and of pictures."""
