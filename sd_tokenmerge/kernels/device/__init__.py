"""Clustering on accelerators, in arrays of fixed shape, without waiting for the device."""
