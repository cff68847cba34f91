"""From measured errors to schedules (LeMiCa, arXiv 2511.00090, section 3)."""
