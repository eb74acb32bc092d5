"""What programs cost: operations, bytes and times, counted without running them or measured (``throughput``)."""
