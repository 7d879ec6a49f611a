"""The process around the app: its socket, connections, TLS and signals."""
