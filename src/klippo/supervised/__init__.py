"""The stages before PPO: supervised fine-tuning and reward models, on TRL's trainers."""
