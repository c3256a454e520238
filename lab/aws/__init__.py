"""The lab's AWS account: API, instance metadata, container registry and package mirror in one container."""
