"""Who finds people in images: networks that give OpenPose's 18 keypoints, whatever keypoints they were trained on."""
