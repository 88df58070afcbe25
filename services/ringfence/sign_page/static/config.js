// What this page is for. `ringfence sign-page build` writes this file.
export const config = Object.freeze({});
