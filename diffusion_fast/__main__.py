from diffusion_fast.cli import main

main()
