// What all parts of the page use.

export const $ = (id) => document.getElementById(id);
export const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);
export const on = (id, event, act) => $(id).addEventListener(event, act);
