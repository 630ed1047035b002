"""Rhizome: the public package (generated gRPC stubs in `rhizome.<noun>.v1`)."""
