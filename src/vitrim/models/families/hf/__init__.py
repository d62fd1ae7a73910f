"""What the families of Hugging Face transformers share: one adapter that works from the layout of each."""
