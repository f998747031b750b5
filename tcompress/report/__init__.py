"""What compression did, brought and cost."""
