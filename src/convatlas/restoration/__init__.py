"""Making images, clips and volumes better than they were recorded."""
