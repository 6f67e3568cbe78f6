"""What faults cost: workers and servers are killed or stopped under load, and every answer is compared."""
