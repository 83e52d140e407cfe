"""Datasets: folders of pictures with captions, aspect-ratio buckets, and the cache of what is computed from them."""
