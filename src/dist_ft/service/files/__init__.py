"""Files of the service and uploads in parts."""
