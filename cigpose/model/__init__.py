"""The network of CIGPose and of its baseline."""
