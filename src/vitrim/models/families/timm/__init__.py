"""What the families of timm share: reduced models, attention and MLP at a variable width, and their weights."""
