"""A model folder in another form: quantized, adapters merged, imported from an original."""
