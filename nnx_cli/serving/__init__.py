"""An HTTP front of inference: requests that arrive together are decoded together."""
