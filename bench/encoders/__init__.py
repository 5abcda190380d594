"""Pretrained encoders converted: embeddings of MiniLM, and reactions of the ALBERT in rxnmapper."""
