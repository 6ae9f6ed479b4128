"""The read side: world models trained on cached latents alone. Imports cache; opens no image and knows no encoder."""
