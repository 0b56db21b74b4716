"""Models in use: images and texts to embeddings, texts to labels."""
