"""StyleGAN2: layers, generator and discriminator."""
