"""What hosts download from outside, made on the controller from package registries, and served by the lab's mirror."""
