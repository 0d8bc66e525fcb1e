"""Models by name or from local weights: GPT, ViT, CNNs, encoders with a head, Llama."""
