"""What travels: requests, answers, statuses and the server's description, each to messages and back."""
