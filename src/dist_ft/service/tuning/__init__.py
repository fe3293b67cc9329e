"""Fine-tuning jobs of the service: requests, plans, records, the dispatcher."""
