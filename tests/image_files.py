"""Small data sets and images of noise, written as files."""

import pickle

import numpy
from PIL import Image
from torchvision import datasets

import zoo.data

FOLDERS = {"MNIST": "MNIST/raw", "CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}


def noise(*shape, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_dataset(name, root):
    """Write a small data set as its authors do: the images and labels of "train" (5 of each class) and "test" (2)."""
    kind, source, written = zoo.data.DATA[name], getattr(datasets, name), {}
    folder = root / FOLDERS[name]
    folder.mkdir(parents=True)
    for part, repeats in (("train", 5), ("test", 2)):
        labels = numpy.arange(repeats * len(kind.class_names)) % len(kind.class_names)
        images = noise(len(labels), kind.in_chans, kind.input_size, kind.input_size, seed=repeats)
        written[part] = (images, labels)
        if name == "MNIST":
            for array, form in ((images[:, 0], "images-idx3"), (labels.astype(numpy.uint8), "labels-idx1")):
                header = numpy.array([0x800 + array.ndim, *array.shape], dtype=">i4")
                file = folder / f"{part.replace('test', 't10k')}-{form}-ubyte"
                file.write_bytes(header.tobytes() + array.tobytes())
            continue
        files = [file for file, md5 in getattr(source, f"{part}_list")]
        for file, chosen in zip(files, numpy.split(numpy.arange(len(labels)), len(files)), strict=True):
            key = "labels" if name == "CIFAR10" else "fine_labels"
            write_pickle(folder / file, {"data": images[chosen].reshape(-1, 3072), key: labels[chosen].tolist()})
        write_pickle(folder / source.meta["filename"], {source.meta["key"]: kind.class_names})
    return written


def write_images(root, counts, size=(8, 8), mode="RGB", form="png"):
    """Write noise as root/FOLDER/0.png, 1.png, ... for each folder and number, and return the images by their paths."""
    images = {}
    for folder, number in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            image = Image.fromarray(noise(size[1], size[0], 3, seed=len(images))).convert(mode)
            image.save(root / folder / f"{index}.{form}")
            images[f"{folder}/{index}.{form}"] = image
    return images
