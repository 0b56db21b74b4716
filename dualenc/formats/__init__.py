"""How other libraries write models: names of tensors, configurations, tokenizers. No model is run here."""
