"""What a layer is to the library, and how a model is searched for layers."""
