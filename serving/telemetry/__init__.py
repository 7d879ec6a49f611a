"""What operators see of a service: metrics, drift, traces and logs."""
