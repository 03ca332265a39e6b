"""Our names of the 14 published models, by the name of their original configuration."""

PRESETS = {
    "cigpose-m_8xb64-420e_coco-wholebody-256x192": "cigpose-m_coco-wholebody_256x192",
    "cigpose-l_8xb64-420e_coco-wholebody-256x192": "cigpose-l_coco-wholebody_256x192",
    "cigpose-l_8xb32-420e_coco-wholebody-384x288": "cigpose-l_coco-wholebody_384x288",
    "cigpose-x_8xb32-420e_coco-wholebody-384x288": "cigpose-x_coco-wholebody_384x288",
    "cigpose-l_8xb32-420e_coco-ubody-256x192": "cigpose-l_coco-ubody_256x192",
    "cigpose-l_8xb32-420e_coco-ubody-384x288": "cigpose-l_coco-ubody_384x288",
    "cigpose-x_8xb32-420e_coco-ubody-384x288": "cigpose-x_coco-ubody_384x288",
    "cigpose-m_1xb384-420e_coco-256x192": "cigpose-m_coco_256x192",
    "cigpose-l_1xb256-420e_coco-256x192": "cigpose-l_coco_256x192",
    "cigpose-l_1xb64-420e_coco-384x288": "cigpose-l_coco_384x288",
    "cigpose-m_1xb64-210e_crowdpose-256x192": "cigpose-m_crowdpose_256x192",
    "cigpose-l_1xb64-210e_crowdpose-256x192": "cigpose-l_crowdpose_256x192",
    "cigpose-l_1xb64-210e_crowdpose-384x288": "cigpose-l_crowdpose_384x288",
    "cigpose-x_1xb64-210e_crowdpose-384x288": "cigpose-x_crowdpose_384x288",
}
