"""Transfer to detection: torchvision's Faster and Mask R-CNN from a pre-trained ResNet, on VOC's and COCO's layouts."""
