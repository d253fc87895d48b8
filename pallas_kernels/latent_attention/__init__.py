"""Multi-head latent attention, absorbed, over pages of latents."""
