"""The wheel and the sdist: built, looked into, installed without the source, and used."""
