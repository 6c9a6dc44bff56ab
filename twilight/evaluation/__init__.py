"""What sparse attention costs in quality: text, tasks and measurements that need no download."""
