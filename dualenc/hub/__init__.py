"""Models on the Hugging Face Hub: pushing, and the model card."""
