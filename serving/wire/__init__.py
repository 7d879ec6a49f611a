"""What goes over the wire: requests, answers, the OpenAPI page, and how values are read."""
