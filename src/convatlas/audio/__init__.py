"""What one does with audio files: spectrograms of recordings of any length."""
