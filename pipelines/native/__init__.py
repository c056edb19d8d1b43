"""The compiled kernel of the native backend: C sources, their build, and the bridge to Python."""
