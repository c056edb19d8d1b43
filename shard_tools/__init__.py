"""Packs images into WebDataset tar shards with an index and a manifest, and checks, describes and reads them back."""
