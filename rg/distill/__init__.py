"""Stock adapters of diffusers that learn from labelled pictures: the model's own, as a head reads them, or others."""
