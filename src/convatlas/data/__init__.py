"""What a user's files look like: readers, splits, built-in data, and what happens to an image before a network sees it.

images          folders of classes, NPZ, MNIST-format idx files and scikit-learn's digits, read as one kind of set
image_files     the image files behind it: found, checked, decoded
arrays          the array formats behind it, validated
pictures        single pictures with depth, transparency and colour profile
png16           PNG files of 16 bits
audio           audio files, whole or in blocks, resampled
image_pairs     images to be enlarged, with their low resolution where it is given
points          point clouds: PLY, OFF, BIN, text and NPZ
point_sets      sets of them: folders of classes, ModelNet, SemanticKITTI
point_shapes    simulated solids and rooms
point_transforms  normalising and random changes of a cloud
sweeps          LiDAR sweeps with boxes: KITTI and simulated streets
video           clips: frames one after the other, and writing with the sound kept
transforms      the evaluation preprocessing and the training augmentation of one image
rand_augment    RandAugment
mixing          mixup and CutMix of a batch
dataset         the torch Dataset over a set of images
skeletons       moving joints: NTU RGB+D files, view, resampling
skeleton_sets   labelled sets of them, and the torch Dataset over one
stick_figures   simulated actions
wave_fem        the wave equation by finite elements, and scenes of it
wave_files      sequences of waves in NPZ files
"""
