"""What policy receives: requests, approvals and grants; verification, admission and load shedding."""
