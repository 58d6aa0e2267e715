"""The families of our networks, with little to compute."""

from pskd.models import build, densenet_cifar, pyramidnet, resnet_cifar, resnext_cifar

SMALL = {
    "preact": lambda: build("preact_resnet8_w16", 5),
    "resnet": lambda: resnet_cifar.build(5, blocks=(2, 1)),
    "resnext": lambda: resnext_cifar.build(5, depth=20, cardinality=4, group_width=4),
    "densenet": lambda: densenet_cifar.build(5, growth=4, blocks=(2, 3)),
    "pyramidnet": lambda: pyramidnet.build(5, depth=29, alpha=20),
    "shakedrop": lambda: pyramidnet.build(5, depth=29, alpha=20, last_survival=0.5),
}
