"""Policy's input: requests, approvals and grants; their verification, admission control and load shedding."""
