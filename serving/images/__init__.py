"""From the images of a request to unit vectors: decoded apart, faces found and judged, embedded together."""
